"""What is drawn from the code into ARCHITECTURE.md."""
