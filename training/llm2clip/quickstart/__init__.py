"""The quickstart: the whole story on real weights and real captioned images."""
