"""What is allowed. Pure: (rules, request) -> decision with reasons."""
