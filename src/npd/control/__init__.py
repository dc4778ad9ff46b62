"""The controller: pure decisions (`plan`), and the one asyncio loop that carries them out."""
