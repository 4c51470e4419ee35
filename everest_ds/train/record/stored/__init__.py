"""What a run has left in its directory, read back; needs no torch and stands whatever the files hold."""
