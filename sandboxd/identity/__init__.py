"""Organizations, projects and API keys; gives every request its Principal."""
