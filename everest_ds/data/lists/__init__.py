"""Lists of videos for training and scoring: reading, checking and sharing them."""
