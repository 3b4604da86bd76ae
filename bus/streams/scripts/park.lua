-- park: move deliveries that are still this worker's to lanes, where they wait.
-- KEYS  1 stream
-- ARGV  1 group  2 consumer  then per entry: id, delay in ms or '@' and the server time in ms at
--       which it is due, delivery count to store
-- Returns per entry the lane; '' if it was not this worker's; 'lost' if its entry is gone.
-- A lane is named by the server time in ms at which all of it is due, rounded up so that there
-- are a few hundred lanes at most; delay 0 is the lane `parked:0`, always due.
-- Atomic  because the owner check and the claim must see the same owner.
-- include _owned
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function lane(said)
  local delay = tonumber(said) or tonumber(string.sub(said, 2)) - now
  if delay <= 0 then return 'parked:0' end
  local grain = 3600000
  if delay <= 60000 then grain = 1000
  elseif delay <= 600000 then grain = 10000
  elseif delay <= 3600000 then grain = 60000
  elseif delay <= 86400000 then grain = 600000 end
  return string.format('parked:%.0f', math.ceil((now + delay) / grain) * grain)
end
local ids = {}
for i = 3, #ARGV, 3 do ids[#ids + 1] = ARGV[i] end
local mine, answer = owned(KEYS[1], ARGV[1], ARGV[2], ids), {}
for i = 3, #ARGV, 3 do
  local id = ARGV[i]
  if not mine[id] then
    answer[#answer + 1] = ''
  else
    local name = lane(ARGV[i + 1])
    local got = redis.call('XCLAIM', KEYS[1], ARGV[1], name, 0, id,
      'RETRYCOUNT', ARGV[i + 2], 'JUSTID')
    answer[#answer + 1] = got[1] and name or 'lost'
  end
end
return answer
