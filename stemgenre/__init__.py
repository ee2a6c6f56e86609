"""Music genre classification from separated stems."""
