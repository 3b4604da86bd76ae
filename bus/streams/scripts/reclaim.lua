-- reclaim: take over what a worker left behind.
-- KEYS  1 stream  2 the lease of the old owner
-- ARGV  1 group  2 consumer  3 old owner  4 most entries to take  5 least idle ms (0: lease decides)
-- Returns {entries as {id, delivery count, fields}, lost ids}. The count stays: what was only
-- fetched and never started has lost nothing yet.
-- Atomic  because an owner that renewed its lease meanwhile must keep everything.
-- include _owned
if ARGV[5] == '0' and redis.call('EXISTS', KEYS[2]) == 1 then return {{}, {}} end
local rows = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[5], '-', '+', ARGV[4], ARGV[3])
return {take(KEYS[1], ARGV[1], ARGV[2], rows, 'keep')}
