-- forget_consumer: remove a dead worker from a group.
-- KEYS  1 stream  2 its lease
-- ARGV  1 group  2 consumer
-- Returns 1 if it is gone now, 0 if it is alive or still owns something.
-- Atomic  because XGROUP DELCONSUMER destroys whatever is pending at that moment.
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
