//! Capabilities and the user of a thread.
//!
//! Both belong to a thread (capabilities(7), credentials(7)): the C library's
//! functions change every thread of a process, the system calls used here only
//! the calling one. Each thread therefore calls these functions itself.

use std::io;

use rustix::io::Errno;
use rustix::process::{Gid, Uid, getegid, geteuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::config::User;

/// Changes the calling thread to `user`, without supplementary groups. Files
/// that are open stay usable.
///
/// # Errors
/// The thread is neither root's nor that user's.
pub(super) fn change_user(user: User) -> io::Result<()> {
    let (uid, gid) = user.ids();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    if geteuid() == uid && getegid() == gid {
        return Ok(());
    }
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// Drops every capability of the calling thread. An ambient one goes with its
/// permitted one.
///
/// # Errors
/// The kernel refused.
pub(super) fn drop_capabilities() -> io::Result<()> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, none)?)
}

/// Empties the bounding set of the calling thread and of the threads that it
/// starts later, which needs `CAP_SETPCAP`. A thread without it keeps the set:
/// it limits what execve(2) can gain, and no_new_privs excludes any gain.
///
/// # Errors
/// The kernel refused for another reason.
pub(super) fn clear_bounding_set() -> io::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // INVAL: the first number that the kernel does not know.
            Err(Errno::INVAL | Errno::PERM) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::thread;

    /// Fields of the calling thread's status in proc(5), in the order of `names`.
    fn status<const N: usize>(names: [&str; N]) -> [String; N] {
        let text = fs::read_to_string("/proc/thread-self/status").unwrap();
        names.map(|name| {
            let mut lines = text.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.unwrap().trim().replace('\t', " ")
        })
    }

    const SETS: [&str; 4] = ["CapInh", "CapPrm", "CapEff", "CapAmb"];

    #[test]
    fn only_the_calling_thread_loses_its_capabilities() {
        let before = status(SETS);
        thread::spawn(|| {
            clear_bounding_set().unwrap();
            drop_capabilities().unwrap();
            let none = "0".repeat(16);
            assert!(status(SETS).iter().all(|set| *set == none));
            if geteuid().is_root() {
                assert_eq!(status(["CapBnd"]), [none]);
            }
            // Again, now without the right to.
            clear_bounding_set().unwrap();
            drop_capabilities().unwrap();
        })
        .join()
        .unwrap();
        assert_eq!(status(SETS), before);
    }

    #[test]
    fn user_changes_with_its_groups_and_opens_what_it_may() {
        let user: User = "65534:65533".parse().unwrap();
        if !geteuid().is_root() {
            return;
        }
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
        fs::set_permissions(
            file.as_path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o600),
        )
        .unwrap();
        thread::scope(|scope| {
            let outcome = scope.spawn(|| {
                clear_bounding_set().unwrap();
                change_user(user).unwrap();
                assert_eq!(
                    status(["Uid", "Gid", "Groups", "CapPrm", "CapBnd"]),
                    [
                        "65534 65534 65534 65534",
                        "65533 65533 65533 65533",
                        "",
                        "0000000000000000",
                        "0000000000000000"
                    ]
                );
                use std::io::Write as _;
                file.as_file().write_all(b"open before").unwrap();
                let error = fs::File::open(file.as_path()).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
                // There is no way back.
                let other: User = "1:1".parse().unwrap();
                let error = change_user(other).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
                // This user is permitted to stay itself.
                change_user(user).unwrap();
            });
            outcome.join().unwrap();
        });
        assert!(geteuid().is_root());
    }
}
