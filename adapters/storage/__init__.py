"""What is stored: the database with its tables and migrations, and the blobs.

Two classes are the seams that everything else uses: `database.SqliteDatabase` for rows, and `blobs.FolderBlobs` for
immutable bytes. `blob_writer` holds the protocol between the two, `store_identity` checks that they belong together,
and unreferenced blobs are kept in quarantine for some days. Read `blobs` first, then `blob_writer`.
"""
