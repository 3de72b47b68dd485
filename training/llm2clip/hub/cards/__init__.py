"""Model cards: facts about a model, rendered as README.md and merged with the edits of people."""
