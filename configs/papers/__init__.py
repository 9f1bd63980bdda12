"""One config per published system: the setting in which its claim is tried here."""
