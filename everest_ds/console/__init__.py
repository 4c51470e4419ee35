"""What people see of a command while it works, and where everything else goes. Leaves."""
