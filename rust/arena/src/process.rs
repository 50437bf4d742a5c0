//! Which process is meant, also after its id was given to another.

use crate::layout::Producer;

/// The calling process.
#[must_use]
pub fn current() -> Producer {
    let pid = std::process::id();
    Producer { pid, start_time: start_time(pid).unwrap_or(0) }
}

/// Whether that very process still runs.
#[must_use]
pub fn is_alive(process: Producer) -> bool {
    start_time(process.pid) == Some(process.start_time)
}

/// Whether a process of that id runs, be it the one that was meant or not.
pub fn exists(pid: u32) -> bool {
    start_time(pid).is_some()
}

/// Start time in clock ticks since boot: field 22 of /proc/PID/stat (proc(5)). None if there is no such process, or if
/// only its exit status is left (state Z or X).
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may hold anything; what follows the last one is plain.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_a_reused_id_is_not() {
        let here = current();
        assert!(is_alive(here));
        assert!(!is_alive(Producer { start_time: here.start_time + 1, ..here }));
    }

    #[test]
    fn a_process_that_has_exited_is_not_alive_though_nobody_reaped_it() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Producer { pid: child.id(), start_time: start_time(child.id()).unwrap() };
        assert!(is_alive(process));
        child.kill().unwrap();
        while is_alive(process) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!is_alive(process));
    }
}
