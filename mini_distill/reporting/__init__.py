"""What a report is made of: read measured folders, choose what to say, draw, write one page."""
