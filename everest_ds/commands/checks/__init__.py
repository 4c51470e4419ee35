"""What `everest doctor` checks with libraries that may be broken; each module is imported in a child process."""
