"""The command `report`: rows of results as Markdown and as one HTML page with pictures."""
