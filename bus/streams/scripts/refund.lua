-- refund: lower the delivery count of parked entries, whose failures turned out to be an outage.
-- KEYS  1 stream
-- ARGV  1 group  then per entry: id, least delivery count, attempts to give back
-- Returns per entry 1 if it was lowered, 0 if not, -1 if its entry is gone.
-- Only in a lane: what a worker holds is counted in that worker's memory. The least count is what
-- the last of those failures left, so that a call repeated after a lost reply gives nothing twice.
-- Lane and idle time (since the failure) stay as they are.
-- Atomic  because a sweeper may be taking the same entry.
local answer = {}
for i = 2, #ARGV, 3 do
  local id, least, back = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1]
  local done = 0
  if row and string.sub(row[2], 1, 7) == 'parked:' and row[4] >= least then
    local got = redis.call('XCLAIM', KEYS[1], ARGV[1], row[2], 0, id,
      'IDLE', row[3], 'RETRYCOUNT', math.max(0, row[4] - back), 'JUSTID')
    done = got[1] and 1 or -1
  end
  answer[#answer + 1] = done
end
return answer
