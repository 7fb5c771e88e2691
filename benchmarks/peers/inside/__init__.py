"""What runs in the environments of the peers: it sees their packages and the standard library, and nothing of Quiver's."""
