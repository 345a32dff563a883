"""One operation, one file: kernel and launcher."""
