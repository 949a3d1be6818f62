"""Version and bounds of the wire. SPEC.md section 13 lists every number with the same reason."""

from __future__ import annotations

MAGIC = b"EMAS"
VERSION_MAJOR = 1  # a peer of another major cannot be read
VERSION_MINOR = 0  # unknown keys and capabilities are ignored, so minors only add

HEADER_BYTES = 64  # one cache line, fixed for every major: version and type can always be read

# 4 MiB measured fastest over tcp and ipc: below it calls cost more than copying, above 32 MiB glibc maps and faults
# every frame. The receiver chooses within these bounds and tells the sender in WELCOME.
CHUNK_BYTES_DEFAULT = 4 << 20
CHUNK_BYTES_MIN = 64 << 10  # smaller frames lose libzmq's zero-copy path
CHUNK_BYTES_MAX = 16 << 20

JOIN_BODY_BYTES_MAX = 16 << 20  # a manifest of 100,000 tensors; no larger than a chunk, so one frame limit serves both
CONTROL_BODY_BYTES_MAX = 64 << 10  # every other JSON body
CONFIG_BYTES_MAX = 1 << 20  # config.json is a model's description, not a data channel
FILES_MAX = 256  # companion files of a run; their list fits a JOIN and a JOINED
FILE_BYTES_MAX = 64 << 20  # twice the largest tokenizer.json in use
FILES_BYTES_MAX = 256 << 20  # of one run in all; the trainer holds them in memory
FILE_NAME_CHARS_MAX = 128

FRAME_BYTES_MAX = CHUNK_BYTES_MAX + (4 << 10)  # what the socket accepts; the slack covers transport security

TENSORS_MAX = 100_000  # bounds the work of checking one manifest
TENSOR_NAME_CHARS_MAX = 1024
DIMENSIONS_MAX = 64  # torch's own limit
MAJORS_MAX = 16  # a HELLO names the majors that a build speaks: rarely more than two
CAPABILITIES_MAX = 64  # names of optional abilities, each
CAPABILITY_CHARS_MAX = 64  # as long as this
GANG_CHARS_MAX = 128  # a job's id, address and restart count fit
NONCE_CHARS_MAX = 128  # 64 bytes in hex, twice what a server sends
PROOF_CHARS_MAX = 128  # 64 bytes in hex, twice an HMAC-SHA256
TEXT_CHARS_MAX = 4096  # an error text for people; whatever its characters, it fits a control body

AVERAGES_MAX = 64  # bounds the memory one JOIN can ask for: 64 models
WINDOW_MAX = 256  # bounds the memory that one window can ask for: 256 snapshots
PATTERNS_MAX = 256  # of all averages of a run: each of them is compared with each name of the manifest
NAME_CHARS_MAX = 96  # the Hugging Face Hub's limit for one part of a repository id

STEP_MAX = (1 << 53) - 1  # exact in every JSON reader
QUANTITY_MIN = 1e-9  # lengths and step units: their quotients and products stay well within the range of a float
QUANTITY_MAX = 1e15  # likewise; larger values make no difference in any run

CREDIT_WINDOW_CHUNKS = 8  # 2 to 4 already saturate loopback; twice that covers scheduling
GANG_WINDOW_BYTES = 256 << 20  # on their way from all ranks of a trainer: what the server may have to hold of them
SLOTS = 2  # one is averaged while the other fills
SHARED_SLOTS_MAX = 8  # that a trainer passes: no more than it may have unanswered
ATTEMPTS_MAX = 3  # a snapshot that fails three times in a row is not the network's fault

HEARTBEAT_S = 2.0
SERVER_SILENT_S = 10.0  # five heartbeats unanswered: the sender opens a fresh connection
SESSION_LOST_S = 60.0  # compilation and checkpoint pauses of a trainer are long
PROBE_S = 2.0  # a live trainer answers a probe from its socket thread at once
RANKS_MAX = 8192  # of one trainer: each has a connection, and CONNECTIONS_MAX are for all trainers
RANKS_WAIT_S = 60.0  # for the other ranks of a sharded trainer: imports and sharding take unequally long
FINISHED_KEPT_S = 60.0  # a rank that is away when its run is finished learns it within this time
PART_WAIT_S = 20.0  # of a step that other ranks have begun; shorter than STALL_S, after which these would reconnect
RECONNECT_PAUSE_S = 1.0  # upper bound of the jittered pause between attempts
REJOIN_PAUSE_MAX_S = 60.0  # a server that refuses again and again may have to load the run each time
REJOINS_MAX = 5  # a run that fails five times in a row at its next snapshot has a defect
HANDSHAKE_S = 5.0  # a HELLO unanswered on a fresh connection; a JOIN may take longer, heartbeats go on meanwhile
STALL_S = 30.0  # heartbeats answered but no chunk credited and no snapshot committed: longer than a publishing pass
REQUEST_S = 300.0  # a PUBLISH, REWIND or FINISH unanswered: longer than writing or loading the largest run
CONNECTIONS_MAX = 10_000  # each costs memory; beyond this the longest silent one without a run is forgotten
RUNS_REMEMBERED_MAX = 10_000  # which session streamed a run last, to evict others that reconnect
RECENT_STEPS = 8  # applied steps a JOINED names; more than the sender can have in flight
