"""What the programs of scripts/ share: how they are entered and configured, what they draw and leave."""
