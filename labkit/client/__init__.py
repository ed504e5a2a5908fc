"""What learners call: it speaks to services over HTTP only and never imports the engine or the service."""
