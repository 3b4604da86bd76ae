-- start: count the start of a reclaimed delivery, just before it runs.
-- KEYS  1 stream
-- ARGV  1 group  2 consumer  3 entry id  4 delivery count to store
-- Returns 1, or 0 if it is not this worker's any more.
-- Atomic  because the owner check and the claim must see the same owner.
if not owned(KEYS[1], ARGV[1], ARGV[2], {ARGV[3]})[ARGV[3]] then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'RETRYCOUNT', ARGV[4], 'JUSTID')
return 1
