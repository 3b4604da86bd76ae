-- retain: trim what is older than the retention time and needed by nobody.
-- KEYS  1 stream
-- ARGV  1 retention in ms
-- Returns {entries trimmed, lost as {group, id, ...}}; call again while about 5,000 were trimmed.
-- Atomic  because what is trimmed must still be needed by nobody when it goes.
-- include _trim
if redis.call('XLEN', KEYS[1]) == 0 then return {0, {}} end
local time = redis.call('TIME')
local oldest = time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(ARGV[1])
if oldest <= 0 then return {0, {}} end
local cut = string.format('%.0f-0', oldest)
local floor, _, lost = floor_of(KEYS[1])
if floor and before(floor, cut) then cut = floor end
local gone = redis.call('XTRIM', KEYS[1], 'MINID', '~', cut, 'LIMIT', 5000)
-- Whole nodes first; what is left of the last one is trimmed singly.
if gone < 4000 then gone = gone + redis.call('XTRIM', KEYS[1], 'MINID', cut) end
return {gone, lost}
