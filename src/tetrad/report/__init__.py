"""What Tetrad tells about itself and its inputs."""
