"""The pages, one module for each. They only read; changes go from the browser through the public API."""
