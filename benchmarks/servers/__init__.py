"""The peers: one small server a file, each as its own documentation would have it written."""
