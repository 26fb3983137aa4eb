from cluster.placement.membership import DRAFTER, VERIFIER, Member, Membership

V = Member(VERIFIER, "v", "10.0.0.1:1")
D = Member(DRAFTER, "d", "10.0.0.2:2")


def test_a_member_is_listed_until_its_time_to_live_is_over():
    membership = Membership()
    membership.register(V, ttl_s=5, now=100)
    assert not membership.expire(104.9)
    assert membership.view.of(VERIFIER) == (V,)
    assert membership.expire(105)
    assert membership.view.members == ()


def test_a_refresh_extends_the_time_to_live_and_leaves_the_version():
    membership = Membership()
    membership.register(V, ttl_s=5, now=100)
    version = membership.view.version
    assert not membership.register(V, ttl_s=5, now=103)
    assert membership.view.version == version
    assert membership.next_expiry() == 108


def test_changed_facts_change_the_version():
    membership = Membership()
    membership.register(V, ttl_s=5, now=0)
    version = membership.view.version
    assert membership.register(Member(VERIFIER, "v", V.address, {"drafter": "d"}), ttl_s=5, now=1)
    assert membership.view.version != version


def test_views_list_by_kind_in_the_order_of_ids():
    membership = Membership()
    for member in (Member(VERIFIER, "w", "h:3"), D, V):
        membership.register(member, ttl_s=5, now=0)
    assert [member.id for member in membership.view.of(VERIFIER)] == ["v", "w"]
    assert membership.view.of(DRAFTER) == (D,)


def test_leaving_takes_effect_at_once_and_twice_is_no_change():
    membership = Membership()
    membership.register(V, ttl_s=5, now=0)
    assert membership.unregister("v")
    assert not membership.unregister("v")
    assert membership.view.members == ()


def test_a_restarted_directory_never_looks_unchanged():
    assert Membership().view.version != Membership().view.version
