"""Care of a store: doctor, repair, scrub, backup, restore, and moves to other storage.

All of them work beside a running service. They read the catalogue with short statements on a connection of their own,
so that no writer waits for them, and need neither the base layer nor torch. Read `blob_checks` first: it says what the
rows of the catalogue expect of the blobs.
"""
