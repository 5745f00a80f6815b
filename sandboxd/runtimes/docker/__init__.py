"""Docker: containers without a network, an ext4 file for each workspace, and the agents' sockets."""
