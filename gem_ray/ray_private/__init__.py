"""Every private name of Ray that this package uses; tests/test_ray_private.py pins them to the installed Ray."""
