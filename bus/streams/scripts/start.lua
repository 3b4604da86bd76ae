-- start: count the start of a reclaimed delivery, just before it runs.
-- KEYS  1 stream
-- ARGV  1 group  2 consumer  3 entry id  4 delivery count to store
-- Returns 1, 0 if it is not this worker's any more, 2 if its entry is gone (acked then).
-- Atomic  because the owner check and the claim must see the same owner.
-- include _owned
if not owned(KEYS[1], ARGV[1], ARGV[2], {ARGV[3]})[ARGV[3]] then return 0 end
local got = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3],
  'RETRYCOUNT', ARGV[4], 'JUSTID')
if got[1] then return 1 end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
return 2
