"""What is stored: the database with its tables and migrations, and the blobs.

Two classes are the seams that everything else uses: `database.Database` for rows, and `blobs.Blobs` for immutable
bytes. `pending_blobs` holds the protocol between the two, `store_identity` checks that they belong together,
and unreferenced blobs are kept in quarantine for some days. Read `blobs` first, then `pending_blobs`.
"""
