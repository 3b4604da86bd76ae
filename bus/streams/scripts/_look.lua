-- Shared fragment of the scripts that append; not a verb by itself. Looks for room in `stream`
-- before `total` entries are added, once per `slack` entries: at the mark, and when a slow group
-- holds the trimming up.
-- Needs   stream, overrun (key), total, keep, slack, most, drop ('1': the oldest may go unhandled)
-- Sets    length; found, only after a look: {who pins it, ghosts, dropped by group}
length = redis.call('XLEN', stream)
do
  local over = length + total - keep
  if length > 0 and (length + total > most
    or (over >= slack and math.floor(over / slack) > math.floor((length - keep) / slack))) then
    -- include _trim
    local who, lost, floor, dropped
    -- Whole nodes are up to 100 entries: a small stream needs single ones to go, to stand at keep.
    length, who, lost, floor = trim(stream, keep, length,
      math.max(length + total - most, over - math.floor(slack / 2)), math.max(total, 100))
    if drop == '1' and length + total > most then
      length, dropped = drop_oldest(stream, keep, length, length + total - most)
      for i = 1, #dropped, 2 do redis.call('HINCRBY', overrun, dropped[i], dropped[i + 1]) end
    end
    found = {pinned_by(who, floor), lost, dropped or {}}
  end
end
