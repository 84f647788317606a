//! Capabilities and the user of a thread.
//!
//! Both belong to a thread (capabilities(7), credentials(7)): the C library's
//! functions change every thread of a process, the system calls used here only
//! the calling one. Each thread therefore calls [`drop_privileges`] itself.

use std::path::Path;
use std::str::FromStr;

use devices::host_file;
use rustix::io::{Errno, Result};
use rustix::process::{Gid, Uid, getegid, geteuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use serde::{Deserialize, Serialize};

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// Upper bound on the bytes that are read of each of these files.
const MAX_DATABASE: usize = 1 << 20;
/// The user and group that chown(2) takes for "unchanged".
const UNCHANGED: u32 = u32::MAX;

/// User and group to which the process changes, never user 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct User {
    uid: u32,
    gid: u32,
}

/// A step of [`drop_privileges`] that the kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// The process has no right to change its user.
    #[error("cannot change to user {}:{}; start as root, or leave out --user", .0.uid, .0.gid)]
    User(User, #[source] Errno),
    /// The capabilities stay.
    #[error("cannot drop capabilities")]
    Capabilities(#[source] Errno),
}

/// Drops every capability of the calling thread, after it has changed to `user`,
/// if there is one, without supplementary groups. Files that are open stay
/// usable.
///
/// # Errors
/// The kernel refused a step. The earlier steps are done.
pub fn drop_privileges(user: Option<User>) -> std::result::Result<(), PrivilegeError> {
    clear_bounding_set().map_err(PrivilegeError::Capabilities)?;
    if let Some(user) = user {
        user.enter()
            .map_err(|error| PrivilegeError::User(user, error))?;
    }
    clear_capabilities().map_err(PrivilegeError::Capabilities)
}

/// Empties the bounding set, which needs `CAP_SETPCAP`. A thread without it
/// keeps the set: it limits what execve(2) can gain, and no_new_privs excludes
/// any gain.
fn clear_bounding_set() -> Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first number that the kernel does not know.
            Err(Errno::INVAL) => break,
            Err(Errno::PERM) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn clear_capabilities() -> Result<()> {
    // A kernel before 4.3 has no ambient set.
    match clear_ambient_capability_set() {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(error),
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none)
}

impl User {
    /// The numbers of user and group.
    #[must_use]
    pub fn ids(self) -> (u32, u32) {
        (self.uid, self.gid)
    }

    fn enter(self) -> Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        if geteuid() == uid && getegid() == gid {
            return Ok(());
        }
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)
    }

    /// Finds `text` (`UID[:GID]`, each a number or a name) in the text of
    /// passwd(5) and group(5).
    fn find(text: &str, passwd: &str, group: &str) -> std::result::Result<Self, String> {
        let (user, of_group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let entry = entry(passwd, user);
        let uid = number(user).or_else(|| entry.and_then(|fields| number(fields.id)));
        let uid = uid.ok_or_else(|| format!("{PASSWD} has no user {user}; give its number"))?;
        if uid == 0 {
            return Err("user 0 is root; name an unprivileged user".into());
        }
        let gid = match of_group {
            Some(name) => number(name)
                .or_else(|| self::entry(group, name).and_then(|fields| number(fields.id)))
                .ok_or_else(|| format!("{GROUP} has no group {name}; give its number"))?,
            None => entry.and_then(|fields| number(fields.next)).unwrap_or(uid),
        };
        Ok(Self { uid, gid })
    }
}

/// Fields of a line of passwd(5) or group(5).
#[derive(Clone, Copy)]
struct Entry<'a> {
    id: &'a str,
    /// The primary group, in passwd(5).
    next: &'a str,
}

/// Finds an entry by its name or its number.
fn entry<'a>(database: &'a str, key: &str) -> Option<Entry<'a>> {
    database.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, id) = (fields.next()?, fields.next()?, fields.next()?);
        let next = fields.next().unwrap_or_default();
        (name == key || id == key).then_some(Entry { id, next })
    })
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number| *number != UNCHANGED)
}

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        // Numbers do not need the files, which a root directory may lack.
        let read = |path| host_file::read_text(Path::new(path), MAX_DATABASE).unwrap_or_default();
        Self::find(text, &read(PASSWD), &read(GROUP))
    }
}

impl TryFrom<String> for User {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<User> for String {
    fn from(user: User) -> Self {
        format!("{}:{}", user.uid, user.gid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::thread;

    const PASSWD_TEXT: &str = "root:x:0:0::/root:/bin/sh\nvm:x:990:991::/:/bin/false\n";
    const GROUP_TEXT: &str = "root:x:0:\nkvm:x:104:vm\n";

    fn found(text: &str) -> Result<(u32, u32), String> {
        User::find(text, PASSWD_TEXT, GROUP_TEXT).map(User::ids)
    }

    type Result<T, E> = std::result::Result<T, E>;

    #[test]
    fn user_is_a_number_or_a_name() {
        assert_eq!(found("1000"), Ok((1000, 1000)));
        assert_eq!(found("1000:2"), Ok((1000, 2)));
        assert_eq!(found("vm"), Ok((990, 991)));
        assert_eq!(found("990"), Ok((990, 991)));
        assert_eq!(found("vm:kvm"), Ok((990, 104)));
        assert_eq!(found("7:kvm"), Ok((7, 104)));
    }

    #[test]
    fn root_and_unknown_users_are_refused_in_one_line() {
        for (text, reason) in [
            ("0", "user 0 is root; name an unprivileged user"),
            ("root", "user 0 is root; name an unprivileged user"),
            ("0:5", "user 0 is root; name an unprivileged user"),
            (
                "nobody2",
                "/etc/passwd has no user nobody2; give its number",
            ),
            (
                "4294967295",
                "/etc/passwd has no user 4294967295; give its number",
            ),
            ("-1", "/etc/passwd has no user -1; give its number"),
            ("", "/etc/passwd has no user ; give its number"),
            ("vm:wheel", "/etc/group has no group wheel; give its number"),
            ("vm:", "/etc/group has no group ; give its number"),
        ] {
            assert_eq!(found(text), Err(reason.into()), "{text}");
        }
    }

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
            drop_privileges(None).unwrap();
            let none = "0".repeat(16);
            assert!(status(SETS).iter().all(|set| *set == none));
            if geteuid().is_root() {
                assert_eq!(status(["CapBnd"]), [none]);
            }
            // Again, now without the right to.
            drop_privileges(None).unwrap();
        })
        .join()
        .unwrap();
        assert_eq!(status(SETS), before);
    }

    #[test]
    fn user_changes_with_its_groups_and_opens_what_it_may() {
        let user = User {
            uid: 65534,
            gid: 65533,
        };
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
                drop_privileges(Some(user)).unwrap();
                assert_eq!(
                    status(["Uid", "Gid", "Groups", "CapEff"]),
                    [
                        "65534 65534 65534 65534",
                        "65533 65533 65533 65533",
                        "",
                        "0000000000000000"
                    ]
                );
                use std::io::Write as _;
                file.as_file().write_all(b"open before").unwrap();
                let error = fs::File::open(file.as_path()).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
                // There is no way back.
                let other = User { uid: 1, gid: 1 };
                let error = drop_privileges(Some(other)).unwrap_err();
                assert!(error.to_string().starts_with("cannot change to user 1:1; "));
                // This user is permitted to stay itself.
                drop_privileges(Some(user)).unwrap();
            });
            outcome.join().unwrap();
        });
        assert!(geteuid().is_root());
    }
}
