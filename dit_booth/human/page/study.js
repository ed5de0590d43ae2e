"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const study = JSON.parse($("study").textContent);
  const collect = document.querySelector("meta[name=collect]").content === "on";
  const store = "study-" + study.id;
  const left = $("left"), right = $("right"), both = [left, right];
  const choices = { left: $("choose-left"), tie: $("choose-tie"), right: $("choose-right") };

  // ---- state: kept in this browser, so that the same page goes on where it was ----------------------------------

  let kept = true;
  function load() {
    try {
      const found = JSON.parse(localStorage.getItem(store));
      return found && found.rater ? found : null;
    } catch { return null; }
  }
  function save() {
    try { localStorage.setItem(store, JSON.stringify(state)); } catch { kept = false; }
  }
  function random(bytes) {
    return [...crypto.getRandomValues(new Uint8Array(bytes))].map((b) => b.toString(16).padStart(2, "0")).join("");
  }
  function ownList() {
    const given = Number(new URLSearchParams(location.hash.slice(1)).get("list"));
    if (Number.isInteger(given) && given >= 1 && given <= study.lists.length) return given - 1;
    return crypto.getRandomValues(new Uint32Array(1))[0] % study.lists.length;
  }
  let state = load() || { rater: random(16), list: ownList(), joined: !collect, screen: "consent", at: 0, n: 0, sent: 0, answers: [], posted: false };

  // ---- answers --------------------------------------------------------------------------------------------------

  const trials = () => study.lists[state.list];
  const steps = () => trials().length * study.questions.length;
  const trialOf = (at) => Math.floor(at / study.questions.length);
  const questionOf = (at) => study.questions[at % study.questions.length];
  const answered = (at) => state.answers.find((a) => a.trial === trialOf(at) && a.question === questionOf(at).name);

  function record(choice) {
    const before = answered(state.at);
    const answer = { trial: trialOf(state.at), question: questionOf(state.at).name, choice, ms: Math.round(performance.now() - asked), n: state.n++ };
    if (before) state.answers.splice(state.answers.indexOf(before), 1);
    state.answers.push(answer);
    state.at += 1;
    if (state.at === steps()) state.screen = "end";
    save();
    flush();
  }

  function crc32(text) {
    let crc = ~0;
    for (const byte of new TextEncoder().encode(text)) {
      crc ^= byte;
      for (let k = 0; k < 8; k++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
    }
    return (~crc >>> 0).toString(16).padStart(8, "0");
  }
  function result() {
    const lines = state.answers.map((a) => [a.trial, a.question, a.choice, a.ms, a.n].join("|"));
    const check = crc32([study.id, state.rater, state.list, ...lines].join("\n"));
    return JSON.stringify({ format: 1, study: study.id, rater: state.rater, list: state.list, answers: state.answers, check }, null, 1);
  }

  // ---- sending: one answer at a time to the server of `study serve`, until it says that it is on disk ------------

  let sending = false;
  async function post(name, body) {
    const reply = await fetch(name, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    if (!reply.ok) throw Object.assign(new Error(await reply.text()), { final: reply.status === 400 || reply.status === 413 });
    return reply;
  }
  async function flush() {
    if (!collect || sending) return;
    sending = true;
    for (let wait = 500; ; ) {
      const next = state.answers.filter((a) => a.n >= state.sent).sort((a, b) => a.n - b.n)[0];
      if (!next) break;
      try {
        await post("answer", { study: study.id, rater: state.rater, list: state.list, ...next });
        state.sent = next.n + 1;
        save();
        problem("");
        wait = 500;
      } catch (error) {
        problem(error.final ? "The server refuses an answer (" + error.message + "). Please tell the researcher." : "Not saved yet. Trying again ...");
        if (error.final) break;
        await new Promise((done) => setTimeout(done, wait));
        wait = Math.min(8000, wait * 2);
      }
    }
    sending = false;
    if (state.screen === "end") showEnd();
  }
  async function join() {
    if (state.joined) return;
    try {
      const reply = await (await post("join", { study: study.id, rater: state.rater })).json();
      state.list = reply.list;
      state.joined = true;
      save();
    } catch (error) { problem("The server does not answer. Please try again later."); throw error; }
  }

  // ---- or all answers at the end to the researcher's address ----------------------------------------------------

  // As text/plain, a request needs no leave beforehand (CORS); the receiver's reply must allow any origin.
  let unsent = false;
  async function send() {
    try {
      const reply = await fetch(study.post, { method: "POST", headers: { "Content-Type": "text/plain" }, body: result() });
      if (!reply.ok) throw new Error(String(reply.status));
      [state.posted, unsent] = [true, false];
      save();
      problem("");
    } catch {
      unsent = true;
      problem("The answers could not be sent. Please try again, or save them as a file and send it to the researcher.");
    }
    showEnd();
  }
  function problem(text) { $("problem").textContent = text; $("problem").hidden = !text; }

  // ---- both videos as one player --------------------------------------------------------------------------------

  const urls = {};
  // Clips are the end of the page, so that the first screens need not wait for them: "" while one is not there yet.
  function media(clip) {
    if (study.beside) return "media/" + clip + ".mp4";
    if (!urls[clip]) {
      const text = $("m" + clip), loaded = document.readyState !== "loading";
      if (!text && loaded) problem("This page is not complete. Please load it again, or get it again from the researcher.");
      if (!text || !(loaded || text.nextSibling)) return "";
      const bytes = Uint8Array.from(atob(text.textContent), (c) => c.charCodeAt(0));
      urls[clip] = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
    }
    return urls[clip];
  }
  let playing = false, watched = 0, last = 0, asked = 0, locked = 0, prompt = null, feedback = null, shown = "";
  const frameOf = (video) => Math.min(prompt.frames - 1, Math.floor(video.currentTime * prompt.fps + 1e-3));

  function setPlaying(on) {
    playing = on;
    if (!on) for (const video of both) video.pause();
    $("play").textContent = on ? "Pause" : "Play";
    $("play").setAttribute("aria-label", on ? "pause" : "play");
  }
  function restart() {
    for (const video of both) video.currentTime = 0;
    setPlaying(true);
  }
  function step(by) {
    const frame = (frameOf(left) + by + prompt.frames) % prompt.frames;
    setPlaying(false);
    for (const video of both) video.currentTime = (frame + 0.5) / prompt.fps;
  }
  const ready = () => both.every((video) => video.readyState >= 2);
  function tick(now) {
    requestAnimationFrame(tick);
    if ($("trial").hidden || !prompt) return;
    if (playing && ready()) {
      for (const video of both) if (video.paused && !video.ended) video.play().catch(() => {});
      watched += Math.min(100, now - last);
      if (both.every((video) => video.ended)) restart();
      else if (Math.abs(left.currentTime - right.currentTime) > 1.5 / prompt.fps && !both.some((video) => video.ended || video.seeking)) right.currentTime = left.currentTime;
    }
    last = now;
    $("frame").textContent = "frame " + (frameOf(left) + 1) + " of " + prompt.frames;
    const open = watched >= 1000 * study.min_seconds && now >= locked && !feedback;
    for (const button of Object.values(choices)) if (button.disabled === open) button.disabled = !open;
    const loaded = both.every((video) => video.readyState >= 1);
    const hint = open || feedback ? "" : loaded ? "Please watch both videos first." : "Loading ...";
    if ($("hint").textContent !== hint) $("hint").textContent = hint;
  }
  requestAnimationFrame(tick);
  for (const video of both) video.addEventListener("error", () => problem("A video cannot be played in this browser. Please try another browser, and tell the researcher."));

  // ---- screens --------------------------------------------------------------------------------------------------

  function show(name) {
    for (const section of document.querySelectorAll("section")) section.hidden = section.id !== name;
    if (name !== "trial") { setPlaying(false); $(name + "-title").focus(); }
    window.scrollTo(0, 0);
  }
  function showPair([index, first, second]) {
    const pair = [index, first, second].join("/") + (state.screen === "trial" ? "/" + trialOf(state.at) : "");
    if (shown === pair) return;
    shown = pair;
    prompt = study.prompts[index];
    watched = 0;
    $("image").src = prompt.image;
    $("image").classList.toggle("tiny", prompt.tiny_image);
    $("caption").textContent = prompt.caption;
    $("videos").classList.toggle("wide", prompt.width > 1.25 * prompt.height);
    $("videos").style.setProperty("--ratio", prompt.width / prompt.height);
    for (const video of both) { video.removeAttribute("src"); video.load(); video.classList.toggle("tiny", prompt.width < 128); }
    setClips(first, second, pair);
  }
  function setClips(first, second, pair) {
    if (shown !== pair) return;
    const found = [media(first), media(second)];
    if (!found.every(Boolean)) return void setTimeout(setClips, 50, first, second, pair);
    [left.src, right.src] = found;
    setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  }
  function ask(question) {
    $("question").textContent = question.text.replaceAll("{subject}", prompt.subject || "subject");
    asked = performance.now();
    locked = asked + 300;
    for (const button of Object.values(choices)) { button.disabled = true; button.classList.remove("chosen"); }
    $("question").focus({ preventScroll: true });
  }
  function showStep() {
    show("trial");
    showPair(trials()[trialOf(state.at)]);
    ask(questionOf(state.at));
    const earlier = answered(state.at);
    if (earlier) choices[earlier.choice].classList.add("chosen");
    $("count").textContent = "pair " + (trialOf(state.at) + 1) + " of " + trials().length + ", question " + ((state.at % study.questions.length) + 1) + " of " + study.questions.length;
    $("progress").value = state.at / steps();
    $("back").disabled = state.at === 0;
    $("begin-line").hidden = $("feedback").hidden = true;
    feedback = null;
  }
  function showExample() {
    show("trial");
    showPair(study.example.pair);
    ask(study.questions[0]);
    $("count").textContent = "an example";
    $("back").disabled = true;
  }
  function answerExample(choice) {
    feedback = choice === study.example.right ? "Yes. " : "Look again. ";
    $("feedback").textContent = feedback + study.example.text;
    $("feedback").hidden = $("begin-line").hidden = false;
    choices[choice].classList.add("chosen");
    $("begin").focus();
  }
  function endText() {
    if (collect) return state.answers.some((a) => a.n >= state.sent) ? "Your last answers are being saved. Please leave this page open." : "All your answers are saved. You can close this page.";
    if (state.posted) return "Your answers were sent. You can close this page.";
    if (study.post && !unsent) return "Your answers are being sent ...";
    return "Please save your answers as a file and send it to the researcher.";
  }
  function showEnd() {
    show("end");
    $("rater").textContent = state.rater;
    $("end-text").textContent = endText();
    $("download").classList.toggle("main", !collect && !state.posted);
    $("send-again").hidden = !unsent;
    if (study.post && !collect && !state.posted && !unsent) send();
  }

  function choose(choice) {
    if (choices[choice].disabled || $("trial").hidden) return;
    if (state.screen === "example") return answerExample(choice);
    record(choice);
    if (!kept) problem("This browser keeps nothing: please do not close the page before the end.");
    if (state.screen === "end") showEnd(); else showStep();
  }
  function back() {
    if ($("back").disabled) return;
    state.at -= 1;
    save();
    showStep();
  }
  async function go(screen) {
    if (screen === "trial") await join();
    state.screen = screen;
    save();
    if (screen === "trial") { shown = ""; showStep(); } else if (screen === "example") showExample();
    else if (screen === "end") showEnd(); else show(screen);
  }

  $("agree").addEventListener("change", () => { $("to-instructions").disabled = !$("agree").checked; });
  $("to-instructions").addEventListener("click", () => go("instructions"));
  $("to-example").addEventListener("click", () => go(study.example ? "example" : "trial").catch(() => {}));
  $("begin").addEventListener("click", () => go("trial").catch(() => {}));
  $("back").addEventListener("click", back);
  $("play").addEventListener("click", () => (playing ? setPlaying(false) : both.some((v) => v.ended) ? restart() : setPlaying(true)));
  $("previous-frame").addEventListener("click", () => step(-1));
  $("next-frame").addEventListener("click", () => step(1));
  for (const [choice, button] of Object.entries(choices)) button.addEventListener("click", () => choose(choice));
  $("send-again").addEventListener("click", send);
  $("download").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([result()], { type: "application/json" }));
    link.download = "answers-" + state.rater.slice(0, 8) + ".json";
    link.click();
  });
  const keys = { 1: "left", ArrowLeft: "left", 2: "tie", ArrowDown: "tie", 3: "right", ArrowRight: "right" };
  document.addEventListener("keydown", (event) => {
    if ($("trial").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const onButton = event.target instanceof HTMLButtonElement;
    if (keys[event.key]) choose(keys[event.key]);
    else if (event.key === " " && !onButton) $("play").click();
    else if (event.key === ",") step(-1);
    else if (event.key === ".") step(1);
    else if (event.key === "Backspace") back();
    else return;
    event.preventDefault();
  });

  document.documentElement.dataset.ready = Math.round(performance.now());
  go(state.screen).catch(() => {});
  flush();
})();
