"""What an attacker still reads from uploaded features. Every result is empirical."""
