-- trim: remove the oldest entries that no group needs, as an operator asks for.
-- KEYS  1 stream
-- ARGV  1 the first id that stays, '' for none  2 entries that stay at least
-- Returns {entries removed, who holds up the rest as {group, floor, pending, lag}, lost as
--         {group, id, ...}}; call again until none was removed.
-- Atomic  because what is trimmed must still be needed by nobody when it goes.
-- include _trim
local length = redis.call('XLEN', KEYS[1])
if length == 0 then return {0, {}, {}} end
local floor, who, lost = floor_of(KEYS[1])
local spare = math.min(length - tonumber(ARGV[2]), 5000)
if spare <= 0 then return {0, {}, lost} end
local cut = ARGV[1]
if not floor and cut == '' then
  return {redis.call('XTRIM', KEYS[1], 'MAXLEN', length - spare), {}, lost}
end
local held = {}
if floor and (cut == '' or before(floor, cut)) then
  local last = cut == '' and '+' or '(' .. cut
  if #redis.call('XRANGE', KEYS[1], floor, last, 'COUNT', 1) > 0 then held = pinned_by(who, floor) end
  cut = floor
end
local gone = redis.call('XTRIM', KEYS[1], 'MINID', '~', cut, 'LIMIT', spare)
if gone < spare then
  -- Whole nodes first. What is left of the last one goes singly.
  local page = redis.call('XRANGE', KEYS[1], '-', '(' .. cut, 'COUNT', math.min(spare - gone, 100))
  if #page > 0 then
    gone = gone + redis.call('XTRIM', KEYS[1], 'MAXLEN', length - gone - #page)
  end
end
return {gone, held, lost}
