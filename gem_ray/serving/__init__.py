"""Online: the annotator's stages as Ray Serve deployments, behind an HTTP API."""
