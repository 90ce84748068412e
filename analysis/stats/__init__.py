"""Statistics on arrays."""
