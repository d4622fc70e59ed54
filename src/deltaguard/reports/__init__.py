"""What people read of a report: terminal tables, HTML pages and the model card, from the schema alone."""
