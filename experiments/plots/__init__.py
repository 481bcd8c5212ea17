"""Pictures and the report page."""
