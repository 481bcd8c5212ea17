"""How a run starts and stops: its flags, devices, processes and folder."""
