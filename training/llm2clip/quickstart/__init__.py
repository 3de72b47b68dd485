"""The quickstart: both stages, the evaluation and the export on pretrained weights and bundled data."""
