"""One copy of each small part that several rooms use."""
