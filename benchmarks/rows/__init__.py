"""The rows, one file each: `ROW` says what is compared, and the functions beside it how.

A module here is imported by its peers' interpreters too, so that it imports nothing but the standard library and the
harness at the top; libraries are imported where they are used.
"""
