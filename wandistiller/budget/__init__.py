"""What a run will cost in memory, disk, time and computing, before it is paid for; it sees no flags and reads no weights."""
