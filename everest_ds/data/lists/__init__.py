"""Lists of videos: what a run trains on and is scored on."""
