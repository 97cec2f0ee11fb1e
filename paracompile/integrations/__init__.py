"""Where other libraries are listened to."""
