"""What the world sees: requests in (pydantic), responses and chunks out (msgspec), errors and their codes."""
