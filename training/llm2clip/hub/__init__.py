"""Publishing: model cards, Hub-ready folders, uploads and exports."""
