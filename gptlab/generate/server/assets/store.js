"use strict";

// The browser's own store, or, where it is not allowed, one that lasts as long as the page.
function storeOf(name) {
  try {
    window[name].getItem("");
    return window[name];
  } catch {
    const held = new Map();
    return {
      get length() { return held.size; },
      key: (i) => [...held.keys()][i],
      getItem: (key) => held.get(key) ?? null,
      setItem: (key, value) => held.set(key, value),
      removeItem: (key) => held.delete(key),
    };
  }
}

// What the browser keeps: each conversation under a key of its own, so that two tabs do not write over one another; settings; the theme.
const store = (() => {
  const kept = storeOf("localStorage"), PREFIX = "gptlab.conversation.", SETTINGS = "gptlab.settings", THEME = "gptlab.theme";

  function read(key) {
    try {
      return JSON.parse(kept.getItem(key));
    } catch {
      return null; // another program's, or cut off
    }
  }

  function write(key, value) {
    try {
      kept.setItem(key, JSON.stringify(value));
      return true;
    } catch {
      return false; // full, or not allowed
    }
  }

  const sound = (c) => c && typeof c.id === "string" && Array.isArray(c.turns)
    && c.turns.every((turn) => turn && typeof turn.prompt === "string" && turn.answers && typeof turn.answers === "object");

  function conversations() {
    const found = [];
    for (let i = 0; i < kept.length; i++) {
      const key = kept.key(i);
      const held = key.startsWith(PREFIX) ? read(key) : null;
      if (sound(held)) found.push(held);
    }
    return found.sort((a, b) => b.changed - a.changed);
  }

  // Alternatives take most of the room: older conversations lose them first, then go.
  function save(conversation) {
    conversation.changed = Date.now();
    const key = PREFIX + conversation.id;
    if (write(key, conversation)) return "";
    const older = conversations().filter((c) => c.id !== conversation.id).reverse();
    for (const other of older) {
      for (const turn of other.turns) for (const answer of Object.values(turn.answers)) answer.tokens.forEach((t) => { t.top = []; });
      write(PREFIX + other.id, other);
      if (write(key, conversation)) return "";
    }
    for (const other of older) {
      kept.removeItem(PREFIX + other.id);
      if (write(key, conversation)) return "The browser's store is full: the oldest conversations were dropped. Export what you want to keep.";
    }
    return "This conversation could not be kept: the browser has no room for it. Export it before you leave.";
  }

  return {
    conversations, save,
    remove: (id) => kept.removeItem(PREFIX + id),
    settings: () => read(SETTINGS) || {},
    keepSettings: (value) => write(SETTINGS, value),
    theme: () => read(THEME),
    keepTheme: (value) => write(THEME, value),
  };
})();
